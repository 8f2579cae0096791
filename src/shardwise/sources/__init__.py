"""Whatever holds tensors, opened: headers, shards, DCP directories, files of ``torch.save``; read by byte range."""
