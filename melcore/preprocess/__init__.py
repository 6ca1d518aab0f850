"""From raw samples to what a network is given: whitening, oversampling, compression, scale, masks, field of view."""
