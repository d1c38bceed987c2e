"""Distillation of a velocity field of one's own into a joint flow map; `flowlik.distill` puts it together."""
