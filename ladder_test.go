package holdfast_test

import (
	"encoding/json"
	"errors"
	"go/ast"
	"go/importer"
	"go/parser"
	"go/token"
	"go/types"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/holdfast-storage/holdfast"

// ladder is the import order of the house: a package may import only packages
// of its own tree on lower rungs, and of the other trees what stands in
// crossings. A package that is not here fails the test: adding one is a
// decision.
var ladder = map[string]int{
	"":                        0,
	"blockdev":                1,
	"blockdev/vfs":            1,
	"blockdev/blockdevtest":   2,
	"blockdev/nbd":            2,
	"blockdev/hostdev":        2,
	"blockdev/mount":          3,
	"blockdev/disk":           3,
	"replication/wire":        2,
	"replication/latency":     1,
	"replication/coordinator": 3,
	"replication/replica":     3,
	"replication/serve":       4,
	"replication/attachment":  4,
	"replication/sim":         5,
	"raftstore/state":         1,
	"raftstore/badgerlog":     2,
	"raftstore":               3,
	"raftstore/peer":          4,
	"plugin":                  1,
	"plugin/docker":           2,
	"cmd/internal/api":        5,
	"cmd/internal/api/apipb":  4,
	"cmd/internal/reconcile":  6,
	"cmd/internal/keeper":     5,
	"cmd/internal/controller": 6,
	"cmd/internal/durable":    5,
	"cmd/internal/lab":        5,
	"cmd/internal/history":    5,
	"cmd/internal/observe":    7,
	"cmd/internal/server":     7,
	"cmd/internal/node":       8,
	"cmd/holdfast":            9,
	"cmd/demo":                9,
	"cmd/bench":               9,
	"cmd/chaos":               9,
	"cmd/e2e":                 9,
	"raftstore/peer/peerpb":   3,
}

// sameRung lists the pairs that stand on one rung and may still meet.
var sameRung = map[[2]string]bool{
	{"replication/attachment", "replication/serve"}: true, // the in-process link to this node's own replicas
}

// trees says which top-level trees a tree may import; cmd may import all.
var trees = map[string][]string{
	"":            {},
	"blockdev":    {""},
	"replication": {"", "blockdev"},
	"raftstore":   {""},
	"plugin":      {""},
	"cmd":         {"", "blockdev", "replication", "raftstore", "plugin"},
}

// pure are the cores that hold the thinking: no goroutine, channel, lock,
// clock, context, randomness or I/O. Their imports are an allow-list.
var pure = map[string][]string{
	"replication/latency":     {"math/bits", "time"},
	"replication/coordinator": {"cmp", "errors", "fmt", "slices", "sort", "strings", "strconv", "math", "math/bits", "encoding/binary", "bytes", "time", "iter", "maps"},
	"replication/replica":     {"cmp", "errors", "fmt", "slices", "sort", "strings", "strconv", "math", "math/bits", "encoding/binary", "bytes", "time", "iter", "maps"},
	"cmd/internal/history":    {"cmp", "encoding/binary", "fmt", "math", "slices", "strings", "time", "github.com/anishathalye/porcupine"},
	"raftstore/state":         {"bytes", "cmp", "crypto/sha256", "encoding/binary", "encoding/hex", "errors", "fmt", "hash/crc32", "iter", "maps", "math", "slices", "sort", "strconv", "strings", "time", "google.golang.org/protobuf/proto"},
}

type listed struct {
	ImportPath, Dir string
	Imports         []string
	GoFiles         []string
}

func packages(t *testing.T) []listed {
	t.Helper()
	out, err := exec.Command("go", "list", "-json=ImportPath,Dir,Imports,GoFiles", "./...").Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	var all []listed
	for dec := json.NewDecoder(strings.NewReader(string(out))); ; {
		var p listed
		if err := dec.Decode(&p); errors.Is(err, io.EOF) {
			return all
		} else if err != nil {
			t.Fatal(err)
		}
		all = append(all, p)
	}
}

func inHouse(path string) (string, bool) {
	if path == module {
		return "", true
	}
	return strings.CutPrefix(path, module+"/")
}

func TestImportLadder(t *testing.T) {
	all := packages(t)
	if len(all) < 2 {
		t.Fatalf("go list found %d packages", len(all))
	}
	for _, p := range all {
		name, _ := inHouse(p.ImportPath)
		rung, ok := ladder[name]
		if !ok {
			t.Errorf("package %q is not on the ladder: decide its rung and add it", name)
			continue
		}
		tree, _, _ := strings.Cut(name, "/")
		for _, imported := range p.Imports {
			other, ours := inHouse(imported)
			if !ours {
				continue
			}
			otherTree, _, _ := strings.Cut(other, "/")
			if tree != otherTree && !slices.Contains(trees[tree], otherTree) {
				t.Errorf("%s imports %s: tree %q may not import tree %q", name, other, tree, otherTree)
			}
			if ladder[other] >= rung && !sameRung[[2]string{name, other}] {
				t.Errorf("%s (rung %d) imports %s (rung %d): imports go down only", name, rung, other, ladder[other])
			}
		}
	}
}

func TestRootImportsOnlyTheStandardLibrary(t *testing.T) {
	for _, p := range packages(t) {
		if name, _ := inHouse(p.ImportPath); name != "" {
			continue
		}
		for _, imported := range p.Imports {
			if strings.Contains(imported, ".") {
				t.Errorf("the root package imports %s", imported)
			}
		}
	}
}

func TestCoresArePure(t *testing.T) {
	for _, p := range packages(t) {
		name, _ := inHouse(p.ImportPath)
		allowed, ok := pure[name]
		if !ok {
			continue
		}
		for _, imported := range p.Imports {
			if _, ours := inHouse(imported); !ours && !slices.Contains(allowed, imported) {
				t.Errorf("%s imports %s, which is not on its allow-list", name, imported)
			}
		}
		for _, file := range p.GoFiles {
			for _, complaint := range impurities(t, filepath.Join(p.Dir, file), nil) {
				t.Errorf("%s", complaint)
			}
		}
	}
}

// impurities lists go statements, channels, selects and uses of the clock.
func impurities(t *testing.T, path string, src any) []string {
	t.Helper()
	set := token.NewFileSet()
	file, err := parser.ParseFile(set, path, src, 0)
	if err != nil {
		t.Fatal(err)
	}
	var found []string
	say := func(n ast.Node, what string) { found = append(found, set.Position(n.Pos()).String()+": "+what) }
	ast.Inspect(file, func(n ast.Node) bool {
		switch n := n.(type) {
		case *ast.GoStmt:
			say(n, "go statement in a pure core")
		case *ast.ChanType:
			say(n, "channel in a pure core")
		case *ast.SelectStmt:
			say(n, "select in a pure core")
		case *ast.SelectorExpr:
			if x, ok := n.X.(*ast.Ident); ok && x.Name == "time" && slices.Contains([]string{"Now", "Since", "Until", "After", "Sleep", "NewTimer", "NewTicker", "Tick", "AfterFunc"}, n.Sel.Name) {
				say(n, "the clock in a pure core")
			}
		}
		return true
	})
	return found
}

// TestApplyRangesOverNoMap keeps the order of a map's keys, which differs
// between members, out of what raft replicates.
func TestApplyRangesOverNoMap(t *testing.T) {
	set := token.NewFileSet()
	load := importer.ForCompiler(set, "source", nil)
	for _, p := range packages(t) {
		name, _ := inHouse(p.ImportPath)
		if _, ok := pure[name]; !ok {
			continue
		}
		var files []*ast.File
		for _, name := range p.GoFiles {
			file, err := parser.ParseFile(set, filepath.Join(p.Dir, name), nil, 0)
			if err != nil {
				t.Fatal(err)
			}
			files = append(files, file)
		}
		for _, at := range mapRanges(t, set, load, p.ImportPath, files) {
			if !orderFree[name+"/"+filepath.Base(at.Filename)+":"+functionAt(set, files, at)] {
				t.Errorf("%v: range over a map in a pure core: iterate in a fixed order", at)
			}
		}
	}
}

// orderFree are the functions that may range over a map, since what they make
// of it does not depend on the order.
var orderFree = map[string]bool{
	"raftstore/state/records.go:LabelsOf": true, // sorts
}

// mapRanges type-checks files and returns where they range over a map.
func mapRanges(t *testing.T, set *token.FileSet, load types.Importer, path string, files []*ast.File) []token.Position {
	t.Helper()
	info := &types.Info{Types: map[ast.Expr]types.TypeAndValue{}}
	if _, err := (&types.Config{Importer: load}).Check(path, set, files, info); err != nil {
		t.Fatal(err)
	}
	var found []token.Position
	for _, file := range files {
		ast.Inspect(file, func(n ast.Node) bool {
			if r, ok := n.(*ast.RangeStmt); ok {
				if _, isMap := info.TypeOf(r.X).Underlying().(*types.Map); isMap {
					found = append(found, set.Position(r.Pos()))
				}
			}
			return true
		})
	}
	return found
}

// functionAt names the function that a position lies in.
func functionAt(set *token.FileSet, files []*ast.File, at token.Position) string {
	for _, file := range files {
		for _, d := range file.Decls {
			if f, ok := d.(*ast.FuncDecl); ok && set.Position(f.Pos()).Filename == at.Filename && set.Position(f.Pos()).Line <= at.Line && at.Line <= set.Position(f.End()).Line {
				return f.Name.Name
			}
		}
	}
	return ""
}

func TestMapRangesAreSeen(t *testing.T) {
	set := token.NewFileSet()
	file, err := parser.ParseFile(set, "x.go", "package x\nfunc f(m map[int]int, s []int) { for range m {}; for range s {} }", 0)
	if err != nil {
		t.Fatal(err)
	}
	if got := mapRanges(t, set, importer.ForCompiler(set, "source", nil), "x", []*ast.File{file}); len(got) != 1 {
		t.Errorf("found %v, want the range over the map", got)
	}
}

func TestImpuritiesAreSeen(t *testing.T) {
	src := `package x
import "time"
func f(c chan int) { go f(nil); select {}; _ = time.Now() }`
	if got := impurities(t, "x.go", src); len(got) != 4 {
		t.Errorf("found %q, want a go statement, a channel, a select and the clock", got)
	}
}

func TestNoForeignTopLevel(t *testing.T) {
	entries, err := os.ReadDir(".")
	if err != nil {
		t.Fatal(err)
	}
	known := []string{"blockdev", "cmd", "docs", "images", "plugin", "raftstore", "replication", "bin", "testdata"}
	for _, e := range entries {
		if e.IsDir() && !strings.HasPrefix(e.Name(), ".") && !slices.Contains(known, e.Name()) {
			t.Errorf("top-level directory %s is not part of the house", e.Name())
		}
	}
}
