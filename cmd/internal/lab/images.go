package lab

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"github.com/holdfast-storage/holdfast"
)

// BaseImage is what every image of the project is built from.
const BaseImage = "debian:bookworm-slim"

// Images are the names of the lab's images in the machine's engine. Each is tagged
// with the hash of what it was built from.
type Images struct {
	Host string // a Docker host
	App  string // stock databases
	Node string // holdfast itself; empty if no binary was given
}

// pullDeadline bounds the attempt to fetch the base image before it is made here.
const pullDeadline = 90 * time.Second

// BuildImages makes those images that do not exist yet. dir is the repository's
// images directory, binary the static holdfast binary ("" for no node image). say is
// told of each step that takes long. Without a registry the base is made by
// debootstrap, which needs root.
func BuildImages(ctx context.Context, dir, binary string, say func(string)) (Images, error) {
	var images Images
	if err := ensureBase(ctx, say); err != nil {
		return images, err
	}
	var err error
	if images.Host, err = buildImage(ctx, filepath.Join(dir, "host"), "hflab-host", "", say); err != nil {
		return images, err
	}
	if images.App, err = buildImage(ctx, filepath.Join(dir, "app"), "hflab-app", "", say); err != nil {
		return images, err
	}
	if binary != "" {
		if images.Node, err = buildImage(ctx, filepath.Join(dir, "node"), "hflab-node", binary, say); err != nil {
			return images, err
		}
	}
	return images, nil
}

// ensureBase makes sure that BaseImage is in the engine.
func ensureBase(ctx context.Context, say func(string)) error {
	if imageExists(ctx, BaseImage) {
		return nil
	}
	say("fetching " + BaseImage)
	pull, cancel := context.WithTimeout(ctx, pullDeadline)
	_, pullErr := docker(pull, "pull", "--quiet", BaseImage)
	cancel()
	if pullErr == nil {
		return nil
	}
	if _, err := exec.LookPath("debootstrap"); err != nil || os.Geteuid() != 0 {
		return holdfast.Errorf(holdfast.ErrUnavailable, "get %s: %w", BaseImage, pullErr).
			WithRemedy("without a registry, install debootstrap and run as root: the image is then made from Debian's packages")
	}
	say("no registry is reachable: making " + BaseImage + " from Debian's packages (half a minute)")
	root, err := os.MkdirTemp("", "hflab-base")
	if err != nil {
		return fmt.Errorf("make a directory for the base image: %w", err)
	}
	defer os.RemoveAll(root) //nolint:errcheck // below the system's temporary directory
	if _, err := run(ctx, nil, "debootstrap", "--variant=minbase", "bookworm", root); err != nil {
		return fmt.Errorf("make the base image: %w", err)
	}
	pack := `rm -f "$1"/var/cache/apt/archives/*.deb; tar -C "$1" -c . | docker import - "$2"`
	if _, err := run(ctx, nil, "sh", "-c", pack, "sh", root, BaseImage); err != nil {
		return fmt.Errorf("import the base image: %w", err)
	}
	return nil
}

// buildImage builds dir, with binary added to the context as "holdfast" unless it is
// "", as name:HASH, unless that exists.
func buildImage(ctx context.Context, dir, name, binary string, say func(string)) (string, error) {
	hash, err := contentHash(dir, binary)
	if err != nil {
		return "", fmt.Errorf("read the sources of image %s: %w", name, err)
	}
	tag := name + ":" + hash
	if imageExists(ctx, tag) {
		return tag, nil
	}
	say("building image " + tag)
	folder, err := os.MkdirTemp("", "hflab-context")
	if err != nil {
		return "", fmt.Errorf("make a build context: %w", err)
	}
	defer os.RemoveAll(folder) //nolint:errcheck // below the system's temporary directory
	if err := os.CopyFS(folder, os.DirFS(dir)); err != nil {
		return "", fmt.Errorf("copy the sources of image %s: %w", name, err)
	}
	if binary != "" {
		if err := copyFile(filepath.Join(folder, "holdfast"), binary, 0o755); err != nil {
			return "", err
		}
	}
	// The label lets old builds be found: docker image prune -f --filter label=holdfast.lab
	if _, err := docker(ctx, "build", "--label", label+"=image", "-t", tag, folder); err != nil {
		return "", fmt.Errorf("build image %s: %w", name, err)
	}
	return tag, nil
}

func imageExists(ctx context.Context, tag string) bool {
	_, err := docker(ctx, "image", "inspect", "-f", "{{.Id}}", tag)
	return err == nil
}

// contentHash is 12 hexadecimal digits over the names, modes and contents of the files
// below dir, and the content of binary unless it is "".
func contentHash(dir, binary string) (string, error) {
	sum := sha256.New()
	err := filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
		if err != nil || entry.IsDir() {
			return err
		}
		info, err := entry.Info()
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		fmt.Fprintf(sum, "%q %v %d\n", rel, info.Mode(), info.Size())
		return hashFile(sum, path)
	})
	if err == nil && binary != "" {
		err = hashFile(sum, binary)
	}
	return hex.EncodeToString(sum.Sum(nil))[:12], err
}

func hashFile(sum io.Writer, path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = io.Copy(sum, f)
	return err
}

func copyFile(to, from string, mode os.FileMode) error {
	src, err := os.Open(from)
	if err != nil {
		return err
	}
	defer src.Close()
	dst, err := os.OpenFile(to, os.O_CREATE|os.O_WRONLY|os.O_EXCL, mode)
	if err != nil {
		return err
	}
	if _, err := io.Copy(dst, src); err != nil {
		dst.Close()
		return fmt.Errorf("copy %s: %w", from, err)
	}
	return dst.Close()
}
