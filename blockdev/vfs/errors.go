package vfs

import "errors"

// ErrLocked is returned by Lock when somebody else holds the file's lock.
var ErrLocked = errors.New("locked by another process")

// ErrCopyOnWrite is returned by NoCopyOnWrite for a file that is not empty.
var ErrCopyOnWrite = errors.New("a file that is not empty cannot be changed to be written in place")
