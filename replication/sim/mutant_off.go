//go:build !holdfast_mutants

package sim

// Mutant names a rule that the model of the disk leaves out on purpose
// (no_seal, reboot_keeps_intact); "" in every other build.
const Mutant = ""
