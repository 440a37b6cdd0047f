"""Failing storage and power cuts, with a real ringplane process and real storage."""
