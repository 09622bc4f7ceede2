"""The same bundle over more images than one machine is for: on Ray Data."""
