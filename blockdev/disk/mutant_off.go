//go:build !holdfast_mutants

package disk

// mutant names the rule that is left out on purpose. In every build but that
// of the crash test's mutants it is the constant "", so that the compiler
// removes the branches.
const mutant = ""
