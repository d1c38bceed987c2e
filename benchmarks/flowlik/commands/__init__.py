"""The commands of `flowlik`, a module a group; `flowlik.cli` gives them their names."""
