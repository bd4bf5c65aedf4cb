"""The stages of a run, one file each; nothing but main imports them."""
