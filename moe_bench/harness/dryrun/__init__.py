"""One rank of a job on tensors without data: what it allocates, computes and sends, without a GPU."""
