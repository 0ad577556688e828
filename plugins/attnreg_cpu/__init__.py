"""Native CPU attention: C++ kernels that the system's compiler builds on first use."""
