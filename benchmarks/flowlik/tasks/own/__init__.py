"""A task of one's own: the arrays it is made of, the file it stands in, and what names its models."""
