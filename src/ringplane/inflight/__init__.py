"""In-flight tracking: requests that a process has fetched are known to the next one if it ends."""
