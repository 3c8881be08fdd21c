//go:build holdfast_mutants

package sim

import (
	"github.com/holdfast-storage/holdfast/replication/coordinator"
	"github.com/holdfast-storage/holdfast/replication/replica"
)

// Mutant names the rule that is left out on purpose.
var Mutant string

// setMutant leaves a rule out, everywhere.
func setMutant(name string) {
	Mutant, coordinator.Mutant, replica.Mutant = name, name, name
}
