"""Tests that read traces with Perfetto."""
