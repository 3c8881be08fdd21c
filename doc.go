// Package holdfast is the vocabulary of the project: the identities, numbers,
// states, error kinds and volume options that every other package speaks in.
// It imports only the standard library and holds nothing that one package
// alone needs; `go doc .` reads as the glossary.
//
// Where to start reading: ids.go for who is who, numbers.go for what is
// counted, states.go for what a thing can be, errors.go for what can go wrong,
// options.go for what a user may ask of a volume.
package holdfast
