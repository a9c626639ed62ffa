"""The `coserve` command. Importing it imports neither torch, transformers nor grpc: `--help` must be quick."""
