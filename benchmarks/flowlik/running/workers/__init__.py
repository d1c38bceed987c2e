"""Workers: the processes that evaluate cells, from inside and from outside."""
