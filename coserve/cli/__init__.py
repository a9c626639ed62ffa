"""The `coserve` command. Importing it brings in no torch, transformers or grpc: --help must be quick."""
