"""What `tritonmoe demo` runs."""
