"""Planning: from the words of a suite or a command line to cells."""
