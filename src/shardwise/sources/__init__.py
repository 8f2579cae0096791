"""Opens what holds tensors: headers, shards, DCP directories, files of ``torch.save``; read by byte range."""
