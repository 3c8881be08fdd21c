//go:build holdfast_mutants

package disk

// mutant names the rule that is left out on purpose (crash tests only).
var mutant string
