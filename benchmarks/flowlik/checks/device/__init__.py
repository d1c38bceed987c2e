"""What a machine does with the suite, part by part: `flowlik device`; docs/gpu.md says how to read its lines."""
