package config

import "path/filepath"

// Flags are the settings that were said on the command line.
type Flags struct {
	given []struct {
		key  key
		text string
	}
}

// Flag is one setting as a command's flag. It has the methods of a pflag.Value.
type Flag struct {
	key key
	all *Flags
}

// List returns a flag for each setting, all of f.
func (f *Flags) List() []*Flag {
	var out []*Flag
	for _, k := range keys() {
		out = append(out, &Flag{k, f})
	}
	return out
}

// Args returns the flags that were said, as arguments that say them again.
func (f *Flags) Args() []string {
	var out []string
	for _, g := range f.given {
		out = append(out, "--"+g.key.name, g.text)
	}
	return out
}

// Name is the setting's.
func (f *Flag) Name() string { return f.key.name }

// Help says what it is for, and its default.
func (f *Flag) Help() string {
	d := Default()
	if v := f.key.get(&d); v != "" && v != "0" {
		return f.key.help + " (default " + v + ")"
	}
	return f.key.help
}

// String is empty: what is not said is no value. The default is part of Help.
func (f *Flag) String() string { return "" }

// Type is what stands for the value in help texts.
func (f *Flag) Type() string { return f.key.value }

// Set checks and keeps what was said; said again, the last holds. A path may be
// relative to where it is said.
func (f *Flag) Set(text string) error {
	if f.key.value == "DIR" && text != "" {
		abs, err := filepath.Abs(text)
		if err != nil {
			return err
		}
		text = abs
	}
	var s Settings
	if err := f.key.set(&s, text); err != nil {
		return err
	}
	for i, g := range f.all.given {
		if g.key.name == f.key.name {
			f.all.given[i].text = text
			return nil
		}
	}
	f.all.given = append(f.all.given, struct {
		key  key
		text string
	}{f.key, text})
	return nil
}
