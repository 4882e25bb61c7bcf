"""The forms in the published style that the fused ones are measured against."""
