"""``torch.distributed.checkpoint``'s storage classes on top of the same writer and reader."""
