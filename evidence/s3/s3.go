// Package s3 is the bucket of an S3 service, Amazon's or any that speaks its
// protocol, as the place to which the evidence store copies what it keeps. An
// alert's way does not touch it: it comes after everything else.
package s3

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"os"
	"strings"
	"time"

	"github.com/minio/minio-go/v7"
	"github.com/minio/minio-go/v7/pkg/credentials"

	"stoop/evidence"
)

// Config is which bucket, and how it is reached.
type Config struct {
	Endpoint string // https://host or https://host:port; with http:// all of it can be read on its way
	Bucket   string
	Prefix   string // begins every key, with a / after it; may be empty
	Region   string
	// Keys are asked for before every request, so that new ones are taken up. The
	// session token may be empty.
	Keys func() (access, secret, session string, err error)
	// CA is a PEM file with the authorities that are trusted; "": the system's.
	CA string
	// Lock is the mode of the object lock that is asked for, GOVERNANCE or
	// COMPLIANCE, for Retention from when an object is put; "": none is.
	Lock      string
	Retention time.Duration
}

// Bucket implements [evidence.Bucket]. Of the permissions it needs s3:PutObject
// alone, and with a lock s3:PutObjectRetention.
type Bucket struct {
	cfg    Config
	client *minio.Client
}

// New checks what can be checked without the network.
func New(c Config) (*Bucket, error) {
	u, err := url.Parse(c.Endpoint)
	switch {
	case err != nil || u.Host == "" || u.Scheme != "https" && u.Scheme != "http":
		return nil, errors.New("the endpoint is no address, such as https://s3.eu-central-1.amazonaws.com")
	case strings.Trim(u.Path, "/") != "" || u.RawQuery != "" || u.User != nil:
		return nil, errors.New("the endpoint has more than a host and a port: the bucket has a key of its own")
	case c.Bucket == "":
		return nil, errors.New("there is no bucket named")
	case c.Lock != "" && c.Retention <= 0:
		return nil, errors.New("a lock needs a retention")
	}
	transport := &http.Transport{
		Proxy:                 http.ProxyFromEnvironment,
		DialContext:           (&net.Dialer{Timeout: 10 * time.Second, KeepAlive: 30 * time.Second}).DialContext,
		TLSHandshakeTimeout:   10 * time.Second,
		ResponseHeaderTimeout: 30 * time.Second,
		IdleConnTimeout:       30 * time.Second,
		MaxIdleConnsPerHost:   1,
		DisableCompression:    true,
		TLSClientConfig:       &tls.Config{MinVersion: tls.VersionTLS12},
	}
	if c.CA != "" {
		pem, err := os.ReadFile(c.CA)
		if err != nil {
			return nil, fmt.Errorf("read the authorities of the endpoint: %w", err)
		}
		pool := x509.NewCertPool()
		if !pool.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("%s holds no certificate", c.CA)
		}
		transport.TLSClientConfig.RootCAs = pool
	}
	client, err := minio.New(u.Host, &minio.Options{
		Creds: credentials.New(keys(c.Keys)), Secure: u.Scheme == "https", Region: c.Region, Transport: transport,
		MaxRetries: 1, // who calls Put knows when to try again
	})
	if err != nil {
		return nil, fmt.Errorf("bucket %s: %w", c.Bucket, err)
	}
	return &Bucket{c, client}, nil
}

// String is where the bucket is, and the prefix in it.
func (b *Bucket) String() string {
	return strings.TrimSuffix(strings.TrimSuffix(b.cfg.Endpoint, "/")+"/"+b.cfg.Bucket+"/"+b.cfg.Prefix, "/")
}

// Put implements [evidence.Bucket]. A file goes in one request, in no more memory
// than a small buffer, with its MD5, which the service checks, and its SHA-256 as
// the metadata sha256.
func (b *Bucket) Put(ctx context.Context, key string, o evidence.Object) error {
	opts := minio.PutObjectOptions{
		ContentType: "application/octet-stream", UserMetadata: map[string]string{"sha256": o.SHA256},
		// The signature covers the MD5, and the MD5 the content: signing it in chunks
		// too adds nothing, and over http sends an empty file without its length.
		SendContentMd5: true, DisableContentSha256: true, DisableMultipart: true,
	}
	if o.JSON {
		opts.ContentType = "application/json"
	}
	if b.cfg.Lock != "" {
		opts.Mode, opts.RetainUntilDate = minio.RetentionMode(b.cfg.Lock), time.Now().Add(b.cfg.Retention).UTC()
	}
	if b.cfg.Prefix != "" {
		key = strings.TrimSuffix(b.cfg.Prefix, "/") + "/" + key
	}
	_, err := b.client.PutObject(ctx, b.cfg.Bucket, key, o.File, o.Size, opts)
	if ctx.Err() != nil {
		return ctx.Err()
	}
	var answer minio.ErrorResponse
	if errors.As(err, &answer) {
		return fmt.Errorf("%s: %w%s", answer.Code, err, advice(answer.Code))
	}
	return err
}

// advice is what helps against an error of the service.
func advice(code string) string {
	switch code {
	case "AccessDenied":
		return " (the keys need s3:PutObject on the bucket, and with a lock s3:PutObjectRetention)"
	case "InvalidAccessKeyId", "SignatureDoesNotMatch":
		return " (are accessKey, secretKey and region right, and the clock?)"
	case "NoSuchBucket":
		return " (stoop makes none: make it, with object lock where evidence.s3.lock is set)"
	case "InvalidRequest":
		return " (evidence.s3.lock needs a bucket that was made with object lock)"
	}
	return ""
}

// keys are read anew for every request.
type keys func() (access, secret, session string, err error)

func (k keys) RetrieveWithCredContext(*credentials.CredContext) (credentials.Value, error) {
	access, secret, session, err := k()
	return credentials.Value{AccessKeyID: access, SecretAccessKey: secret, SessionToken: session, SignerType: credentials.SignatureV4}, err
}

func (k keys) Retrieve() (credentials.Value, error) { return k.RetrieveWithCredContext(nil) }

func (keys) IsExpired() bool { return true }
