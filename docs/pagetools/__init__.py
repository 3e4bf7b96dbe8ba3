"""How the pages of this documentation are checked and rendered. Not part of the library."""
