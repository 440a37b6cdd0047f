"""What a malicious driver or front end does to a real ringplane process: ../shared/hostile.md, a test for each row."""
