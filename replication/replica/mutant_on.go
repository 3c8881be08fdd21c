//go:build holdfast_mutants

package replica

// Mutant names the rule that is left out on purpose (simulator tests only).
var Mutant string
