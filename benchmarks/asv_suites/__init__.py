"""asv benchmark classes. Parameters never depend on the machine; each cell is a process of its own, so few of them."""
