"""What a run has beside model and optimizer: schedulers, random numbers, data order, extra state."""
