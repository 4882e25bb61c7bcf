"""Data sets that are held in memory: CIFAR, digits, glyphs and folders of images."""
