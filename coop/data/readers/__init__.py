"""How each kind of folder is read where no split file says it: one small function per true difference."""
