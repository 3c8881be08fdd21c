package vfs

import "errors"

// ErrLocked is returned by Lock when somebody else holds the file's lock.
var ErrLocked = errors.New("locked by another process")
