"""The data sets that are held in memory."""
