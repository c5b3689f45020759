"""What the methods of one family share: abstract dataclasses between `Method` and the methods, one file for each family."""
