"""Every decision about how a matrix is filtered, made once and written into a Plan."""
