"""freemerge's methods inside of other merging libraries. Each module here imports its library; nothing imports them."""
