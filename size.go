package holdfast

import (
	"fmt"
	"math/big"
	"strconv"
	"strings"
)

// Bounds of a volume's size in bytes.
const (
	// MinVolumeSize is the least a volume may be: below it no file system fits.
	MinVolumeSize = 16 << 20
	// MaxVolumeSize bounds a volume at 64 TiB, what the segment count and the
	// chunk map are sized for.
	MaxVolumeSize = 64 << 40
)

var sizeUnits = map[string]int64{
	"": 1 << 30, "b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40, "p": 1 << 50,
}

// ParseSize reads a size: a decimal number and an optional binary unit
// (B K M G T P, also KB, KiB and so on, in any case); without a unit it is GiB,
// as users of Docker volume drivers type it. The result is in bytes. A negative,
// fractional-byte or overflowing size is an ErrInvalid error.
func ParseSize(s string) (int64, error) {
	text := strings.ToLower(strings.TrimSpace(s))
	end := strings.IndexFunc(text, func(r rune) bool { return (r < '0' || r > '9') && r != '.' })
	number, unit := text, ""
	if end >= 0 {
		number, unit = text[:end], strings.TrimSpace(text[end:])
	}
	invalid := func() (int64, error) {
		return 0, Errorf(ErrInvalid, "%q is not a size", s).WithRemedy("write a number and a unit, for example 10G, 512M or 1.5T; without a unit it is GiB")
	}
	if number == "" || len(number) > 32 || strings.Count(number, ".") > 1 {
		return invalid()
	}
	if unit != "b" {
		unit = strings.TrimSuffix(strings.TrimSuffix(unit, "b"), "i")
	}
	factor, ok := sizeUnits[unit]
	if !ok {
		return invalid()
	}
	value, ok := new(big.Rat).SetString(number)
	if !ok {
		return invalid()
	}
	value.Mul(value, new(big.Rat).SetInt64(factor))
	if !value.IsInt() {
		return 0, Errorf(ErrInvalid, "%q is not a whole number of bytes", s).WithRemedy("use a smaller unit")
	}
	if !value.Num().IsInt64() {
		e := Errorf(ErrInvalid, "%q is larger than any disk", s)
		if unit == "" {
			return 0, e.WithRemedy("without a unit a size is in GiB; did you mean bytes? then write %sB", number)
		}
		return 0, e.WithRemedy("write a smaller number or a smaller unit")
	}
	return value.Num().Int64(), nil
}

// CheckVolumeSize refuses sizes that no volume can have, and says what was
// probably meant when a number of bytes was given without its unit. text is
// the size as the user wrote it; whose size it is the caller says.
func CheckVolumeSize(n int64, text string) error {
	switch {
	case n < MinVolumeSize:
		return Errorf(ErrInvalid, "%s (%d bytes) is less than the smallest volume, %s", text, n, FormatSize(MinVolumeSize)).WithRemedy("give at least %s", FormatSize(MinVolumeSize))
	case n > MaxVolumeSize:
		e := Errorf(ErrInvalid, "%s (%d bytes) is more than the largest volume, %s", text, n, FormatSize(MaxVolumeSize)).WithRemedy("give at most %s", FormatSize(MaxVolumeSize))
		if _, err := strconv.ParseInt(text, 10, 64); err == nil {
			return e.WithRemedy("without a unit a size is in GiB; did you mean bytes? then write %sB", text)
		}
		return e
	case n%BlockSize != 0:
		return Errorf(ErrInvalid, "%s (%d bytes) is not a multiple of %d bytes", text, n, BlockSize).WithRemedy("use %d", (n+BlockSize-1)/BlockSize*BlockSize)
	}
	return nil
}

// FormatSize writes a number of bytes for people, in the largest binary unit
// that keeps it exact, else with one decimal: 10 GiB, 1.5 TiB, 4096 B.
func FormatSize(n int64) string {
	units := []string{"B", "KiB", "MiB", "GiB", "TiB", "PiB"}
	i := 0
	v := float64(n)
	for i < len(units)-1 && (v >= 1024 || v <= -1024) {
		v /= 1024
		i++
	}
	if v == float64(int64(v)) {
		return fmt.Sprintf("%d %s", int64(v), units[i])
	}
	return fmt.Sprintf("%.1f %s", v, units[i])
}
