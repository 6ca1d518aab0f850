"""What streaming is made of: when each plane is computed, where it waits, and the convolutions themselves."""
