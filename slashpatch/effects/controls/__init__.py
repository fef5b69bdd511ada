"""The same edit elsewhere: at other heads, offsets or rotary pairs."""
