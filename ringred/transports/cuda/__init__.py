"""Memory and streams of devices, for `shm`'s control plane: a driver, and what is built on any driver."""
