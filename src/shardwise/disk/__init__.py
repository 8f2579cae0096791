"""What touches a disk: file operations as an interface, guarded reads, checksums, locks of processes."""
