"""Floor 0: which mesh axis cuts what, and what code on one device needs to know of it."""
