"""What one device computes between collectives: attention, norms, rotary embedding, activations."""
