"""How much memory a run needs, told before any weight is read: a real update on tensors that have shapes but no values."""
