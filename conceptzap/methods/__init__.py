"""Methods, one file each: concept -> edits. The file name is the method's name."""

DEFAULT = "zap"
