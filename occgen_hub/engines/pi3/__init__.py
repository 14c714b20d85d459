"""The networks pi3 and pi3x, and the engines that reconstruct with them."""
