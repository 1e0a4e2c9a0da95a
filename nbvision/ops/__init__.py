"""Functions on images, boxes and masks, on both devices."""
