//go:build !holdfast_mutants

package coordinator

// Mutant names the rule that is left out on purpose. In every build but that
// of the simulator's mutant tests it is the constant "", so that the compiler
// removes the branches.
const Mutant = ""
