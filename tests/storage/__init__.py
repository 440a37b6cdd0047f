"""Storage that fails, and power that is cut: a real ringplane process on real storage that does so."""
